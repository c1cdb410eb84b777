"""The version of meshbolt, where every layer can read it without a look into the installation."""

__version__ = "0.1.0"
