"""Which engines are in memory, and which step goes next."""
