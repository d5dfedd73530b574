"""Devices and programs: meshes, batches, chips, process start-up, compiled programs."""
