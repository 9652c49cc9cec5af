"""See the package that this file opens."""
