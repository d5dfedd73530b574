"""Data pipelines: from image files to batches of uint8 arrays. Independent of the model.

| module         | content                                                                     |
| -------------- | --------------------------------------------------------------------------- |
| `spec`         | `DatasetSpec`: which images a data set consists of, and their size          |
| `dataset`      | `open_training`, `open_test`: decoded, resized, cached                      |
| `new_images`   | images without labels, for prediction: `list_images`, `open_image`          |
| `arrays`       | images that are given as arrays, by the rules for files                     |
| `holdout`      | the training images that are held out for validation, by whole groups       |
| `textures`     | `open_textures`: the texture images that corruptions use                    |
| `pipeline`     | `batches`: the batch of step s is a pure function of (seed, s)              |
| `folder`       | source: a folder in MVTec layout                                            |
| `lists`        | package: source: a list of images, one CSV or JSON-lines file                |
| `importers`    | package: lists of public data sets and of annotations                       |
| `elpv`         | source: ELPV, electroluminescence images of solar cells                     |
| `procedural`   | source: drawn images, no files needed                                       |
| `tfds_source`  | source: prepared TFDS data sets                                             |
| `items`        | `Item`: one encoded image of a source, not yet read                         |
| `image_files`  | which files below a folder are images; what is left out is told             |
| `decode`       | encoded files to arrays                                                     |
| `value_range`  | the values of more than 8 bits that become 0…255, for a whole data set      |
| `checks`       | warnings about opened files, masks and decoded arrays                       |
| `cache`        | decoded arrays on disk, memory-mapped                                       |
| `cache_folder` | where the cache is, what it holds, and its bound                            |
| `patterns`     | families of drawn textures                                                  |
| `prepare`      | command line: writes MVTec AD and VisA as TFDS data sets                    |
| `tfds_builder` | the TFDS builder that `mvtec_ad` and `visa` share                           |
| `errors`       | exceptions and warnings, each of one line                                   |
"""
