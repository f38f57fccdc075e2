"""Read or make records: from files, hub data sets, and the embedded arithmetic.

A file or pipe holds JSON lines, one JSON array, CSV, or Parquet, perhaps compressed by gzip. Its content decides which,
not its name. It is read once. plainrl/layouts.py says which fields a record may have.
"""

import codecs
import csv
import gzip
import hashlib
import io
import json
import random
import re
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from plainrl.devices import run_command
from plainrl.layouts import FIELDS, Record
from plainrl.records import UserError, first_line, one_line
from plainrl.shared_config import EMBEDDED_DATA, is_embedded

if TYPE_CHECKING:
    import pyarrow

GZIP, PARQUET = b"\x1f\x8b", b"PAR1"  # how such data begin
JSON_SPACE = re.compile(r"[ \t\n\r]*")
DELIMITERS = ",;\t"  # of CSV
BLANK = " \r\n"  # before the first line of CSV, which a tab may begin: a column without a name
NUM_ARITHMETIC_TRAIN = 8192
NUM_ARITHMETIC_VALIDATION = 1024


def read_records(source: str, also: Collection[str] | None = ()) -> Iterable[tuple[dict[str, Any], str]]:
    """Yield the records of a file, pipe or hub data set, each with the place where it stands (file and line).

    Args:
        source: path of a file or pipe, or `owner/name[/configuration]:split` of a hub data set.
        also: columns of a table that are converted beside those of the layouts (None: all).

    Raises:
        UserError: the file is missing, empty or damaged (the message names the line or record), or a record is not an
            object.
    """
    path = Path(source)
    if not path_exists(path):
        if re.fullmatch(r"[\w.-]+/[\w.-]+(/[\w.-]+)?:[\w.-]+", source):
            yield from _read_hub(source, also)
            return
        raise UserError(
            f"data file {source} does not exist; docs/data.md says where to get data; or name a JSON, JSON lines, CSV "
            f"or Parquet file, a hub data set as owner/name:split or owner/name/configuration:split, or {EMBEDDED_DATA}"
        )
    yield from records_in(read_data_file(source), source, also)


def records_in(data: bytes, source: str, also: Collection[str] | None = ()) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the records in the content of a file, which was read before; see `read_records`."""
    if data.startswith(PARQUET):
        yield from _read_parquet(data, source, also)
        return
    text = decode_text(data, f"data file {source}")
    for item, where in (_read_csv if _is_csv(text) else _read_json)(text, source):
        if not isinstance(item, dict):
            raise UserError(f"{where}: expected an object with fields, found {type(item).__name__}")
        yield item, where


def read_data_file(source: str) -> bytes:
    """Return the content of a file or pipe. If it is gzipped, it is unpacked.

    Raises:
        UserError: it is a folder or a device, it cannot be read, or its gzip data are damaged.
    """
    path = Path(source)
    if path.is_dir():
        raise UserError(f"data file {source} is a folder; name one file in it")
    if not path.is_file() and not is_pipe(source):
        raise UserError(f"data file {source} is a device; name a file or a pipe")
    try:
        data = path.read_bytes()  # at once, because a pipe cannot be opened a second time
    except OSError as error:
        raise UserError(f"data file {source} cannot be read ({error.strerror})") from None
    try:
        return gzip.decompress(data) if data.startswith(GZIP) else data
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"data file {source} is a damaged gzip file ({first_line(error)}); copy it again") from None


def embedded_terms(source: str, default: tuple[int, int]) -> tuple[int, int] | None:
    """Return the fewest and most terms of embedded questions; None if a source is something else.

    Args:
        source: `arithmetic`, `arithmetic:TERMS` or `arithmetic:FEWEST-MOST`; or a file, or a hub data set.
        default: those of `arithmetic`.

    Raises:
        UserError: the text after the colon is no such range.

    >>> embedded_terms("arithmetic", (2, 4)), embedded_terms("arithmetic:5", (2, 4)), embedded_terms("a.csv", (2, 4))
    ((2, 4), (5, 5), None)
    """
    if not is_embedded(source):
        return None
    _, colon, text = source.partition(":")
    if not colon:
        return default
    found = re.fullmatch(r"([0-9]{1,3})(?:-([0-9]{1,3}))?", text)
    fewest, most = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 2 <= fewest <= most:
        raise UserError(f"{source}: write {EMBEDDED_DATA}:TERMS or {EMBEDDED_DATA}:FEWEST-MOST, with at least 2 terms")
    return fewest, most


@cache
def arithmetic_records(
    split: Literal["train", "validation"], num_terms: tuple[int, int], max_term: int
) -> tuple[Record, ...]:
    """Return sums and differences of small numbers with worked traces.

    The same settings always give the same questions. A hash of its text decides which split a question belongs to, so
    that training and validation share none. A quarter of all distinct questions may be held out. The smallest task in
    use (2 or 3 terms up to 10) then has 3,154 training and 1,024 validation questions.

    Args:
        split: train (at most 8,192 questions) or validation (at most 1,024).
        num_terms: fewest and most terms of a question.
        max_term: largest term. The smallest is 1, and results may be negative.
    """
    generator = random.Random("embedded arithmetic")
    wanted = NUM_ARITHMETIC_TRAIN if split == "train" else NUM_ARITHMETIC_VALIDATION
    num_possible = sum(max_term**n * 2 ** (n - 1) for n in range(num_terms[0], num_terms[1] + 1))
    drawn: set[tuple[int | str, ...]] = set()
    records: list[Record] = []
    for _ in range(40 * wanted):  # bounded, because small settings have fewer distinct questions than wanted
        terms = [generator.randint(1, max_term) for _ in range(generator.randint(*num_terms))]
        signs = [generator.choice("+-") for _ in terms[1:]]
        if (*terms, *signs) in drawn:
            continue
        drawn.add((*terms, *signs))
        question, reasoning, answer = _work_out(terms, signs)
        is_validation = hashlib.sha256(question.encode()).digest()[0] < 64
        if is_validation == (split == "validation"):
            source = f"{EMBEDDED_DATA} {split}, question {len(records) + 1}"
            records.append(Record(source=source, question=question, reasoning=reasoning, ground_truth=str(answer)))
        if len(records) == wanted or len(drawn) == num_possible:
            break
    return tuple(records)


def corrupt_some(records: Sequence[Record], fraction: float) -> list[Record]:
    """Return arithmetic records, a share of them with a wrong last sum and answer. Their ground truths stay right.

    A hash of the question alone decides whether it is wrong, and by how much (1 to 9, up or down). A larger share
    therefore contains the smaller one, and the same question is always wrong in the same way.

    Args:
        records: from `arithmetic_records`.
        fraction: about which share becomes wrong, from 0 to 1.

    >>> record = Record(source="s", question="q", reasoning="1 + 2 = 3. 3 + 4 = 7.", ground_truth="7")
    >>> corrupt_some([record], 1.0)[0].reasoning
    '1 + 2 = 3. 3 + 4 = 15.'
    """
    chosen = []
    for record in records:
        digest = hashlib.sha256(f"corrupt {record.question}".encode()).digest()
        if int.from_bytes(digest[:4]) >= fraction * 2**32:
            chosen.append(record)
            continue
        offset = (1 + digest[4] % 9) * (1 if digest[5] % 2 else -1)
        wrong = str(int(record.ground_truth or "") + offset)
        reasoning = (record.reasoning or "").removesuffix(f"{record.ground_truth}.") + f"{wrong}."
        chosen.append(replace(record, reasoning=reasoning, wrong_answer=wrong))
    return chosen


def path_exists(path: Path) -> bool:
    """Return whether a path exists. It is false if a text is too long to be a path."""
    try:
        return path.exists()
    except OSError:  # the text is too long for a path
        return False


def is_pipe(source: str) -> bool:
    """Return whether a source of data is a pipe, which can be read only once: `<(command)`, or /dev/stdin."""
    return path_exists(Path(source)) and Path(source).is_fifo()


def decode_text(data: bytes, name: str, errors: Literal["strict", "surrogateescape"] = "strict") -> str:
    r"""Return UTF-8 bytes as text, without a byte order mark (BOM), and with `\n` at the end of each line.

    With errors="surrogateescape" other bytes become characters that `layouts.strange_character` finds.

    Raises:
        UserError: the bytes are not UTF-8. The message begins with `name`.

    >>> decode_text(b"\xef\xbb\xbfa\r\nb", "f")
    'a\nb'
    """
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in data[:2]:
        raise UserError(f"{name} is UTF-16 or UTF-32 text, or holds NUL bytes; convert it to UTF-8")
    try:
        text = data.decode("utf-8-sig", errors)
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{name} is not UTF-8 text (line {line}, byte {error.start}); convert it to UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json_lines(text: str, source: str) -> Iterator[tuple[Any, str]]:
    """Yield the value of each line that is not empty, with its place. Of a line that is no JSON it is an error."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line := line.removeprefix("\ufeff").strip():  # a BOM, where files were joined
            try:
                item = DECODER.decode(line)
            except (ValueError, RecursionError) as error:
                item = BrokenLineError(_explain(error))
            yield item, f"{source}, line {number}"


class BrokenLineError(ValueError):
    """A line that is no JSON. It says why."""


def _work_out(terms: list[int], signs: list[str]) -> tuple[str, str, int]:
    total, steps, expression = terms[0], [], str(terms[0])
    for sign, term in zip(signs, terms[1:], strict=True):
        result = total + term if sign == "+" else total - term
        steps.append(f"{total} {sign} {term} = {result}.")
        expression += f" {sign} {term}"
        total = result
    return f"What is {expression}?", " ".join(steps), total


def _read_json(text: str, source: str) -> Iterator[tuple[Any, str]]:
    """Yield the items of a JSON array, or one item per line, each with its place."""
    if not text.strip():
        raise UserError(f"data file {source} is empty; give a file with at least one record")
    if text.lstrip().startswith("["):
        yield from _read_array(text, source)
        return
    for item, where in read_json_lines(text, source):
        if isinstance(item, BrokenLineError):
            raise UserError(f"{where}: broken JSON ({item}); fix that line")
        yield item, where


def _read_array(text: str, source: str) -> Iterator[tuple[Any, str]]:
    """Yield the items of a JSON array one by one, so that the message about a bad one can name it."""

    def broken(reason: str, position: int) -> UserError:
        line = text.count("\n", 0, position) + 1
        return UserError(f"{source}, line {line}: broken JSON array ({reason}); fix record {index}")

    def next_token(position: int) -> int:
        return cast(re.Match, JSON_SPACE.match(text, position)).end()

    index, position = 1, next_token(text.index("[") + 1)
    is_at_end = text.startswith("]", position)
    while not is_at_end:
        try:
            item, end = DECODER.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise broken(_explain(error), getattr(error, "pos", position)) from None
        yield item, f"{source}, record {index}"
        position = next_token(end)
        is_at_end = text.startswith("]", position)
        if not is_at_end:
            if not text.startswith(",", position):
                raise broken("expected , or ] after the record", position)
            index, position = index + 1, next_token(position + 1)
    if text[position + 1 :].strip():
        raise broken("text follows the array", next_token(position + 1))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON. Doubled keys are an error, because one of the two values would be lost."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands twice")
    return values


DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def _explain(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return error.msg if isinstance(error, json.JSONDecodeError) else first_line(error).partition(";")[0]


def _is_csv(text: str) -> bool:
    """Return whether a text begins with a line of column names. JSON begins with a brace or a bracket."""
    header = text.lstrip(BLANK).partition("\n")[0]
    return not header.lstrip().startswith(("{", "[")) and any(mark in header for mark in DELIMITERS)


def _read_csv(text: str, source: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the rows of a CSV file. All values are text. Commas, semicolons or tabs separate them."""
    table = text.lstrip(BLANK)
    header = table.partition("\n")[0]
    reader = csv.reader(io.StringIO(table, newline=""), delimiter=max(DELIMITERS, key=header.count), strict=True)
    lines_before = text[: len(text) - len(table)].count("\n")
    names: list[str] = []
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # of the whole process: only ever raised
    try:
        for row in reader:
            where = f"{source}, line {lines_before + reader.line_num}"
            if not names:
                names = [name.strip() for name in row]
                if len(set(names)) < len(names):
                    raise UserError(f"{where}: two columns have one name; rename one of {', '.join(names)}")
            elif row and len(row) != len(names):
                raise UserError(
                    f"{where}: {len(row)} values, but the first line names {len(names)} columns; put values that hold "
                    "a separator or a line break into double quotes"
                )
            elif row:
                yield dict(zip(names, row, strict=True)), where
    except csv.Error as error:
        raise UserError(f"{source}, line {lines_before + reader.line_num}: broken CSV ({error}); fix it") from None


def _read_parquet(data: bytes, source: str, also: Collection[str] | None) -> Iterator[tuple[dict[str, Any], str]]:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(pyarrow.BufferReader(data))
        names = file.schema_arrow.names
        chosen = [name for name in names if also is None or name.lower() in FIELDS or name in also]
        doubled = {name for name in chosen if names.count(name) > 1}
        if doubled:
            raise UserError(f"data file {source} has several columns {doubled.pop()}; leave one")
        table = file.read(columns=chosen)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:  # all of them come of damaged files
        raise UserError(
            f"data file {source} starts like Parquet but cannot be read ({first_line(error)}); write it again"
        ) from error
    yield from _read_table(table, names, file.metadata.num_rows, source)


def _read_hub(source: str, also: Collection[str] | None) -> Iterator[tuple[dict[str, Any], str]]:
    import datasets

    address, split = source.split(":")
    owner, name, *configuration = address.split("/")
    try:
        rows = datasets.load_dataset(f"{owner}/{name}", *configuration, split=split)
    except Exception as error:  # of any type, because the library raises many: unknown name or split, no network
        command = run_command(f"hf download {owner}/{name} --repo-type=dataset --local-dir data/{name}")
        raise UserError(
            f"data set {source} could not be loaded ({one_line(error)}); write it as OWNER/NAME:SPLIT or "
            f"OWNER/NAME/CONFIGURATION:SPLIT, or download it with `{command}`, and name one of its files"
        ) from error
    names = rows.column_names
    chosen = [name for name in names if also is None or name.lower() in FIELDS or name in also]
    table = rows.select_columns(chosen).with_format("arrow")[:]
    yield from _read_table(table, names, len(rows), source)


def _read_table(
    table: "pyarrow.Table", names: Sequence[str], num_rows: int, source: str
) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the rows of a table. A column that was not chosen is None, whatever it holds: it is not converted."""
    columns = {name: _column_values(table.column(name), name, source) for name in table.column_names}
    for index in range(1, num_rows + 1):
        yield {name: next(columns[name]) if name in columns else None for name in names}, f"{source}, row {index}"


def _column_values(column: "pyarrow.ChunkedArray", name: str, source: str) -> Iterator[Any]:
    """Yield the values of a column as Python's own.

    A float32 is the shortest number that rounds to it, 0.1 and not 0.10000000149.
    """
    import pyarrow

    if pyarrow.types.is_floating(column.type):
        yield from (None if text is None else float(text) for text in column.cast(pyarrow.string()).to_pylist())
        return
    for index, scalar in enumerate(column, start=1):
        try:
            yield scalar.as_py()
        except (pyarrow.ArrowException, ValueError, OverflowError, LookupError, ImportError) as error:
            raise UserError(
                f"{source}, row {index}: field {name} cannot be read as {column.type} ({first_line(error)}); "
                "write it as text"
            ) from error
