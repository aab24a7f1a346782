"""Storage of files and folders: locations, compression, atomic outputs, locks, provenance."""
