"""Foundation of all rooms: errors, settings, files on disk, processes and devices."""
