"""Released activations, kept for all epochs: a client sends a record once, later steps name it.

One append-only file a client, read through a memory map; each entry carries its length and its SHA-256, so a damaged
one counts as missing and is sent again. Nothing is evicted for another entry: what the disk budget cannot hold is not
taken, and its owner sends it in each epoch. A full disk costs all of them, for a round comes first. Under other terms,
and after the end, all of it goes. It is a cache: deleting it costs bandwidth and nothing else.
"""

from __future__ import annotations

import hashlib
import mmap
import shutil
import struct
from dataclasses import dataclass, field
from pathlib import Path

from splitfl.errors import StorageError
from splitfl.files import storage_errors, write_file
from splitfl.wire.messages import ELEMENT_BYTES, TensorBytes, expected_bytes

MAGIC = b"SFLR"
HEADER = struct.Struct("<4s16s4s4xII32s")  # magic, name, dtype, time, width, SHA-256
ALIGNMENT = 64
HEADER_BYTES = 128


@dataclass(frozen=True)
class Place:
    """Where an entry's bytes lie, and what they are."""

    offset: int
    dtype: str
    shape: tuple[int, int]
    sha256: bytes

    @property
    def nbytes(self) -> int:
        return expected_bytes(self.dtype, self.shape)


@dataclass
class Shelf:
    """One client's file: an index by name, and a map that is made anew as the file grows."""

    path: Path
    places: dict[str, Place] = field(default_factory=dict)
    end: int = 0
    view: memoryview = field(default_factory=lambda: memoryview(b""))

    def read(self, place: Place) -> memoryview:
        """An entry's bytes, where they lie."""
        if place.offset + place.nbytes > len(self.view):
            with self.path.open("rb") as file:
                self.view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        return self.view[place.offset : place.offset + place.nbytes]


class Releases:
    """The cache of all clients in ``folder``, ``budget`` bytes at most. One thread calls it.

    Of ``clients`` that share it none may take more than its part, and it leaves ``reserve`` bytes of the disk free.
    What came under other ``terms`` (a hash) is deleted.
    """

    def __init__(self, folder: Path, budget: int, clients: int = 1, *, terms: str = "", reserve: int = 0) -> None:
        self.folder = folder
        self.budget = budget
        self.share = budget // clients
        self.reserve = reserve
        self._shelves: dict[str, Shelf] = {}
        self.size = 0
        self._terms = folder / "agreement"
        if not (self._terms.is_file() and self._terms.read_text() == terms):
            self.clear()
            write_file(self._terms, terms.encode())
        with storage_errors(folder):
            folder.chmod(0o700)
            for path in sorted(folder.glob("*.bin")):
                self._shelves[path.stem] = opened(path)
        self.size = sum(shelf.end for shelf in self._shelves.values())

    def holds(self, client: str, name: str) -> bool:
        """Whether an entry is there; its bytes are checked when they are used."""
        return client in self._shelves and name in self._shelves[client].places

    def put(self, client: str, name: str, payload: TensorBytes) -> bool:
        """Keep (T, D) of a record; False when there is no room for it."""
        if self.holds(client, name):
            return True
        entry = HEADER_BYTES + payload.nbytes + -payload.nbytes % ALIGNMENT
        shelf = self._shelves.setdefault(client, Shelf(self.folder / f"{client}.bin"))
        if self.size + entry > self.budget or shelf.end + entry > self.share:
            return False
        try:
            with storage_errors(shelf.path):
                if shutil.disk_usage(self.folder).free < self.reserve + entry:
                    return False
                self._append(shelf, name, payload)
        except StorageError:
            return False
        self.size += entry
        return True

    def _append(self, shelf: Shelf, name: str, payload: TensorBytes) -> None:
        digest = hashlib.sha256(payload.data).digest()
        time, width = payload.shape
        header = HEADER.pack(MAGIC, bytes.fromhex(name), payload.dtype.encode(), time, width, digest)
        with shelf.path.open("r+b" if shelf.path.exists() else "w+b") as file:
            file.seek(shelf.end)
            file.write(header.ljust(HEADER_BYTES, b"\0"))
            file.write(payload.data)
            file.write(bytes(-payload.nbytes % ALIGNMENT))
        shelf.places[name] = Place(shelf.end + HEADER_BYTES, payload.dtype, (time, width), digest)
        shelf.end += HEADER_BYTES + payload.nbytes + -payload.nbytes % ALIGNMENT

    def get(self, client: str, name: str) -> TensorBytes | None:
        """An entry, or None: there is none, or its bytes are not those that came, and it is forgotten."""
        shelf = self._shelves.get(client)
        place = shelf.places.get(name) if shelf is not None else None
        if shelf is None or place is None:
            return None
        try:
            data = shelf.read(place)
        except OSError:
            data = memoryview(b"")
        if hashlib.sha256(data).digest() != place.sha256:
            del shelf.places[name]
            return None
        return TensorBytes(place.dtype, place.shape, data)

    def forget(self, client: str) -> None:
        """Delete what one client released."""
        shelf = self._shelves.pop(client, None)
        if shelf is not None:
            self.size -= shelf.end
            shelf.path.unlink(missing_ok=True)

    def give_way(self) -> None:
        """Delete all entries: the disk is needed for more than this."""
        for client in list(self._shelves):
            self.forget(client)

    def clear(self) -> None:
        """Delete everything."""
        self._shelves.clear()
        self.size = 0
        with storage_errors(self.folder):
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True, exist_ok=True)
            self.folder.chmod(0o700)


def opened(path: Path) -> Shelf:
    """A client's file as an earlier start left it, up to the first entry that is not whole."""
    shelf, size = Shelf(path), path.stat().st_size
    with path.open("rb") as file:
        while shelf.end + HEADER_BYTES <= size:
            file.seek(shelf.end)
            magic, name, dtype, time, width, digest = HEADER.unpack(file.read(HEADER.size))
            wire = dtype.rstrip(b"\0").decode(errors="replace")
            if magic != MAGIC or wire not in ELEMENT_BYTES:
                break
            place = Place(shelf.end + HEADER_BYTES, wire, (time, width), digest)
            end = place.offset + place.nbytes + -place.nbytes % ALIGNMENT
            if end > size:
                break
            shelf.places[name.hex()], shelf.end = place, end
    return shelf
