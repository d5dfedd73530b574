"""Where and how the programs run: meshes, batches, chips, process start-up, compiled programs."""
