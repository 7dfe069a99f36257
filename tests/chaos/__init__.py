"""The chaos program: real processes and clients under injected faults, and a comparison with MongoDB at the end."""
