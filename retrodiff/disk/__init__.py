"""Writes files whole, locked and hashed, and reads files that are not trusted."""
