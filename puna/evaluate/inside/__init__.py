"""What runs inside the sandboxes, on its own: no site-packages, nothing else of puna, next to no imports.

`main` is one process that waits, and makes for every judgement a process in fresh namespaces; `filter` is which system
calls are refused to that; `hold` is what it does for the untrusted program, `test` for the trusted test, and `data` is
what the two say to each other; `run` runs programs in other languages.
"""
