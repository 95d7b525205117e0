"""MindRecord, MindSpore's files of rows: read without its index, written with one, and a lost index made again.

    X          a header of JSON, then pages of equal size: blob pages with arrays, raw pages with single values
    X.db       SQLite: where each row is; the original cannot read X without it, this reader does not look at it

`MindRecord.open` maps a file, `open_all` all its shards; `write_mindrecord` writes rows, `write_prepared` those of a
prepared folder; `write_index` makes a lost `.db`.

Source: mindspore 2.7 `mindspore/ccsrc/minddata/mindrecord`.
"""

from puna.data.mindrecord.file import MindRecord
from puna.data.mindrecord.from_prepared import write_prepared
from puna.data.mindrecord.index import write_index
from puna.data.mindrecord.writer import write_mindrecord

__all__ = ["MindRecord", "write_index", "write_mindrecord", "write_prepared"]
