"""Files and folders: locations, compression, atomic outputs, locks, provenance."""
