"""Data sets given by a list: one file that names every image, its split, type and masks.

| module      | content                                                        |
| ----------- | -------------------------------------------------------------- |
| `list_file` | the list: `Row`, `read_list`, `write_list`, `check_rows`       |
| `source`    | the source of `data.source="list"`                             |
| `table`     | the rows of a CSV file with their line numbers                 |
"""
