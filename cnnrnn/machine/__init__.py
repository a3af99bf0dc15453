"""The machine we run on: files, devices, processes, progress."""
