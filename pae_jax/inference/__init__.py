"""A trained model in use: `pae predict`, and `pae_jax.load` in Python.

| module      | content                                                                  |
| ----------- | ------------------------------------------------------------------------ |
| `model`     | `load`, `Model`, `Result`: from images of any size to maps and decisions |
| `tiles`     | large images at their own size: what the network sees, memory, joining   |
| `stitching` | where tiles lie in an image, and how their maps are joined               |
| `stream`    | decoding, detection and writing at once, in bounded memory               |
| `regions`   | the connected regions above a threshold of the map                       |
| `output`    | the folder of a prediction: tables that grow, continuation               |
"""
