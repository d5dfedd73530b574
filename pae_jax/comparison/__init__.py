"""`pae compare`: several runs on the same test images, with paired intervals."""
