"""Files: written whole, locked, hashed, and read without trust."""
