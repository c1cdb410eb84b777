"""meshbolt."""
