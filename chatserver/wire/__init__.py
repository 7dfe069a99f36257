"""Stream formats, pure: the bytes of events."""
