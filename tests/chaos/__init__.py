"""The program that shows the promises under faults: real processes, real clients, and a comparison at the end."""
