"""A trained model for use elsewhere: exported programs, packed folders and their model card."""
