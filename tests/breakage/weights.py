"""Hostile files of weights: code, floods, bombs, lies about sizes, two readings of one archive, damage, foreign files.

KINDS maps a name to a function of a random generator that returns the bytes of a file (or makes something else at a
path). Programs of pickles are written opcode by opcode; CANARY is the file that code in them would make.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import socket
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save

WEIGHTS = {"model.weight": torch.arange(6.0).view(3, 2), "model.bias": torch.arange(3.0)}
CANARY = "canary"
ESCAPES = "evil\x1b[31m\x1b]0;title\x07\r\nname\u202e"


class Dice(random.Random):
    """Draws variations; `share` of the full size of floods."""

    share = 1.0

    def many(self, *numbers: int) -> int:
        """Return one of these large numbers."""
        return int(self.choice(numbers) * self.share) + 1


Make = Callable[[Dice], bytes]
KINDS: dict[str, Make] = {}
SPECIAL: dict[str, Callable[[Path], object]] = {}


def kind(function: Make) -> Make:
    """Enter a function under its name, as words."""
    KINDS[function.__name__.strip("_").replace("_", " ")] = function
    return function


def hostile(folder: Path, variations: int, seed: int = 0, share: float = 1.0) -> Iterator[tuple[str, Path]]:
    """Write so many files of each kind, floods by a share of their size, and what is no file. Yields kind and path."""
    for name, make in KINDS.items():
        for number in range(variations):
            path = folder / f"{name.replace(' ', '_')}_{number}.ckpt"
            dice = Dice(f"{seed} {name} {number}")
            dice.share = share
            path.write_bytes(make(dice))
            yield name, path
    for name, place in SPECIAL.items():
        path = folder / f"{name.replace(' ', '_')}.ckpt"
        place(path)
        yield name, path


# --- pickles ----------------------------------------------------------------------------------------------------------


def text(value: str) -> bytes:
    """Push a text."""
    content = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(content)) + content


def number(value: int) -> bytes:
    """Push an integer."""
    return pickle.dumps(value, 2)[2:-1]


def named(module: str, name: str) -> bytes:
    """Push what a name stands for."""
    return f"c{module}\n{name}\n".encode()


def call(module: str, name: str, *arguments: bytes) -> bytes:
    """Push what a call returns."""
    return named(module, name) + b"(" + b"".join(arguments) + b"tR"


def storage(key: str = "0", count: int = 6, type_name: str = "FloatStorage") -> bytes:
    """Push a storage."""
    return b"(" + text("storage") + named("torch", type_name) + text(key) + text("cpu") + number(count) + b"tQ"


def tensor(
    size: tuple[int, ...] = (3, 2), stride: tuple[int, ...] = (2, 1), offset: int = 0, part: bytes = b""
) -> bytes:
    """Push a tensor."""
    sides = [b"(" + b"".join(map(number, numbers)) + b"t" for numbers in (size, stride)]
    hooks = call("collections", "OrderedDict")
    return call("torch._utils", "_rebuild_tensor_v2", part or storage(), number(offset), *sides, b"\x89", hooks)


def state(*entries: bytes) -> bytes:
    """Return a program for {"state_dict": {"model.weight": ..., *entries}}; entries push a name and a value."""
    inner = b"}(" + text("model.weight") + tensor() + b"".join(entries) + b"u"
    return b"\x80\x02}" + text("state_dict") + inner + b"s."


def beside(payload: bytes) -> bytes:
    """Return a program for a state dict with something beside it."""
    return state()[:-1] + text("other") + payload + b"s."


PARTS = {"data/0": torch.arange(6.0).numpy().tobytes(), "version": b"3\n"}


def archive(program: bytes, parts: dict[str, bytes] | None = None, before: dict[str, bytes] | None = None) -> bytes:
    """Return an archive as torch.save writes it, with parts before its program."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in {**(before or {}), "data.pkl": program, **(PARTS if parts is None else parts)}.items():
            file.writestr(f"archive/{name}", content)
    return buffer.getvalue()


def saved(content: object, zipped: bool = True) -> bytes:
    """Return what torch.save writes."""
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


GOOD = saved({"state_dict": WEIGHTS})


# --- code -------------------------------------------------------------------------------------------------------------

_TOUCH, _PYTHON = f"touch {CANARY}", f"open({CANARY!r}, 'w').close()"
CALLS = [
    (module, name, _TOUCH)
    for module, name in (
        ("os", "system"), ("posix", "system"), ("nt", "system"), ("os", "popen"), ("subprocess", "getoutput"),
        ("commands", "getoutput"), ("pty", "spawn"), ("asyncio.subprocess", "create_subprocess_shell"),
        ("ldm.weights.files.os", "system"), ("ldm.weights.files", "os.system"), ("torch.serialization", "os.system"),
    )
] + [
    (module, name, _PYTHON)
    for module, name in (
        ("builtins", "eval"), ("builtins", "exec"), ("__builtin__", "eval"), ("__builtin__", "exec"),
        ("timeit", "timeit"), ("cProfile", "run"), ("profile", "run"), ("pdb", "run"), ("code", "interact"),
        ("numpy.testing._private.utils", "runstring"), ("torch.jit.unsupported_tensor_ops", "execWrapper"),
        ("torch._inductor.codecache", "PyCodeCache.load"), ("doctest", "debug_script"), ("trace", "Trace.run"),
        ("torch.utils._config_module", "ConfigModule.load_config"), ("idlelib.pyshell", "ModifiedInterpreter.runcode"),
    )
] + [
    (module, name, CANARY)
    for module, name in (
        ("builtins", "open"), ("io", "open"), ("io", "FileIO"), ("_io", "open"), ("os", "mkdir"),
        ("pathlib", "Path.touch"),
        ("logging", "FileHandler"), ("sqlite3", "connect"), ("dbm.dumb", "open"), ("shelve", "open"),
        ("runpy", "run_path"),
        ("importlib", "import_module"), ("pip", "main"), ("ctypes", "CDLL"), ("webbrowser", "open"), ("torch", "load"),
        ("torch.hub", "load"), ("numpy", "load"), ("pandas", "read_pickle"), ("joblib", "load"), ("dill", "loads"),
    )
]  # fmt: skip


def _spelled(way: str, module: str, name: str, argument: bytes) -> bytes:
    """Push a call in one of the ways that an unpickler knows."""
    target = named(module, name)
    arguments = b"(" + argument + b"t"
    return {
        "reduce": target + arguments + b"R",
        "inst": b"(" + argument + f"i{module}\n{name}\n".encode(),
        "obj": b"(" + target + argument + b"o",
        "newobj": target + arguments + b"\x81",
        "newobj_ex": target + arguments + b"}\x92",
        "stack_global": text(module) + text(name) + b"\x93" + arguments + b"R",
        "memo": text(module) + b"q\x010" + text(name) + b"q\x020h\x01h\x02\x93" + arguments + b"R",
        "nested": call("torch._tensor", "_rebuild_from_type_v2", target, target, arguments, b"N"),
        "build": target + b"}" + text("__setstate__") + target + b"sb" + arguments + b"R",
        "key": b"}" + target + arguments + b"RNs",
        "extension": b"\x82\x01" + arguments + b"R",
    }[way]


WAYS = ("reduce", "inst", "obj", "newobj", "newobj_ex", "stack_global", "memo", "nested", "build", "key", "extension")


@kind
def code_beside_the_weights(dice: Dice) -> bytes:
    module, name, argument = dice.choice(CALLS)
    return archive(beside(_spelled(dice.choice(WAYS), module, name, text(argument))))


@kind
def code_in_the_state_dict(dice: Dice) -> bytes:
    module, name, argument = dice.choice(CALLS)
    return archive(state(text("evil") + _spelled(dice.choice(WAYS), module, name, text(argument))))


@kind
def code_as_a_part_of_a_tensor(dice: Dice) -> bytes:
    module, name, argument = dice.choice(CALLS)
    payload = _spelled(dice.choice(WAYS), module, name, text(argument))
    return archive(
        state(text("a") + tensor(part=payload) if dice.random() < 0.5 else text("a") + b"(" + payload + b"tQ")
    )


@kind
def code_in_the_old_format(dice: Dice) -> bytes:
    module, name, argument = dice.choice(CALLS)
    payload = b"\x80\x02" + _spelled(dice.choice(WAYS), module, name, text(argument)) + b"."
    parts = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, {}, [])]
    parts[dice.randrange(1, 5)] = payload
    return b"".join(parts)


@kind
def code_after_the_end_of_the_program(dice: Dice) -> bytes:
    module, name, argument = dice.choice(CALLS)
    return archive(state() + b"\x80\x02" + call(module, name, text(argument)) + b".")


@kind
def code_in_an_object_that_changes_functions(dice: Dice) -> bytes:
    target = named(
        *dice.choice([("torch._utils", "_rebuild_tensor_v2"), ("collections", "OrderedDict"), ("torch", "Size")])
    )
    attributes = b"}" + text(dice.choice(["__code__", "__class__", "poisoned"])) + named("os", "system") + b"s"
    return archive(beside(target + (attributes if dice.random() < 0.5 else b"N" + attributes + b"\x86") + b"b"))


# --- floods and bombs -------------------------------------------------------------------------------------------------


@kind
def copies_of_an_expanded_tensor(dice: Dice) -> bytes:
    big = tensor((1 << 24,), (0,)) + b"r\x01\x00\x01\x000"
    copy = call("torch._utils", "_rebuild_device_tensor_from_cpu_tensor", b"j\x01\x00\x01\x00",
                named("torch", "float32"),
                text("cpu"), b"\x89")  # fmt: skip
    return archive(beside(big + b"](" + copy * dice.many(20, 200) + b"e"))


@kind
def names_of_expanded_tensors(dice: Dice) -> bytes:
    sides = dice.choice([((1 << 24,), (0,)), ((1 << 12, 1 << 12), (0, 0)), ((6, 1 << 22), (1, 0))])
    return archive(state(*(text(f"t{i}") + tensor(*sides) for i in range(500))))


@kind
def one_expanded_tensor_under_many_names(dice: Dice) -> bytes:
    first = text("a") + tensor((1 << dice.randrange(20, 40),), (0,)) + b"q\x01"
    return archive(state(first, *(text(f"t{i}") + b"h\x01" for i in range(500))))


@kind
def calls_with_long_sequences(dice: Dice) -> bytes:
    module, name = dice.choice(
        [("torch", "Size"), ("collections", "OrderedDict"), ("builtins", "list"), ("builtins", "set")]
    )
    item = b"K\x01" if name == "Size" else b"(K\x01K\x02l"
    sequence = b"(" + item * 40_000 + b"lq\x010"
    return archive(beside(sequence + b"](" + call(module, name, b"h\x01") * dice.many(5_000) + b"e"))


@kind
def a_length_without_content(dice: Dice) -> bytes:
    length = dice.choice([1 << 40, 3 << 30, (1 << 63) - 1, 1 << 29])
    short, long = struct.pack("<I", min(length, (1 << 32) - 1)), struct.pack("<Q", length)
    prefixes = [b"\x96" + long, b"\x8e" + long, b"\x8d" + long, b"B" + short, b"X" + short, b"T" + short[:3] + b"\x7f",
                b"\x8b" + short[:3] + b"\x7f", b"\x95" + long]  # fmt: skip
    return archive(beside(dice.choice(prefixes) + b"abc"))


@kind
def memory_by_name(dice: Dice) -> bytes:
    module = dice.choice(["builtins", "__builtin__"])
    return archive(
        beside(
            call(module, dice.choice(["bytearray", "bytes", "range", "list"]), number(dice.choice([3 << 30, 1 << 40])))
        )
    )


@kind
def a_memo_of_gigabytes(dice: Dice) -> bytes:
    return archive(b"\x80\x02" + b"Nr" + struct.pack("<I", dice.choice([1 << 31, (1 << 32) - 1])) + b"0" + state()[2:])


@kind
def a_flood_of_one_operation(dice: Dice) -> bytes:
    unit = dice.choice([b"]", b"}", b"(", b"\x8f", b"N", b")", b"cos\nsystem\n", b"ca\nb\n", b"K\x01K\x02s", b"(((",
                        b"N2",
                       b"]\x94", b"\x8c\x01a\x94", b"K\x01\x85", b"I1\n", b"(l", b"(d", b"}\x94}\x94s"])  # fmt: skip
    return archive(beside(unit * (dice.many(3_000_000, 20_000_000) // len(unit))))


@kind
def a_flood_of_tensors(dice: Dice) -> bytes:
    program = tensor()[:-1] + b"q\x010" + named("torch._utils", "_rebuild_tensor_v2") + b"q\x020"
    return archive(beside(program + b"](" + b"h\x02h\x01R" * dice.many(1_000_000) + b"e"))


@kind
def a_flood_of_storages(dice: Dice) -> bytes:
    reference = storage()[:-1] + b"q\x010"
    return archive(beside(reference + b"](" + b"h\x01Q" * dice.many(10_000, 1_000_000) + b"e"))


@kind
def depth(dice: Dice) -> bytes:
    number_of, unit = dice.many(100_000, 2_000_000), dice.choice([b"\x85", b"tuple", b"list", b"dict"])
    if unit == b"\x85":
        return archive(beside(b"N" + unit * number_of))
    number_of = min(number_of, 600_000)
    opened = {b"tuple": b"(", b"list": b"]", b"dict": b"}N"}[unit]
    return archive(beside(opened * number_of + b"N" + {b"tuple": b"t", b"list": b"a", b"dict": b"s"}[unit] * number_of))


@kind
def deep_keys(dice: Dice) -> bytes:
    nested = b"N" + b"\x85" * dice.many(5_000, 3_000_000)
    ordered = call("collections", "OrderedDict", b"](" + nested + b"N\x86e")
    return archive(beside(dice.choice([b"}" + nested + b"Ns", b"(" + nested + b"Nd", ordered])))


@kind
def keys_that_hash_slowly_or_alike(dice: Dice) -> bytes:
    if dice.random() < 0.5:
        keys = b"".join(number(i * ((1 << 61) - 1)) + b"N" for i in range(1, dice.many(60_000)))
        return archive(beside(b"}(" + keys + b"u"))
    size = dice.many(1 << 20)
    key = dice.choice([b"\x8b" + struct.pack("<I", size) + b"\x01" * size, b"(" + b"K\x01" * size + b"t"]) + b"q\x010"
    return archive(beside(key + b"}(" + b"h\x01N" * dice.many(200_000) + b"u"))


@kind
def names_composed_of_megabytes(dice: Dice) -> bytes:
    part = text(dice.choice(["a", "\x01", "é"]) * dice.many(7_000_000)) + b"q\x010"
    return archive(beside(part + b"](" + b"h\x01h\x01\x93" * dice.many(1_000, 200_000) + b"e"))


@kind
def a_name_of_megabytes(dice: Dice) -> bytes:
    name = dice.choice(["a", "\x01", "\u202e", "a "]) * dice.many(9_000_000)
    return archive(beside(dice.choice([f"cos\n{name}\n".encode(), text("os") + text(name) + b"\x93"])))


@kind
def copies_of_a_dict(dice: Dice) -> bytes:
    entries = b"".join(text(f"{chr(256 + i)}{chr(256 + i // 97)}") + b"N" for i in range(20_000))
    return archive(beside(b"}(" + entries + b"uq\x010" + b"](" + call("collections", "OrderedDict", b"h\x01")
                          * dice.many(1_000, 100_000) + b"e"))  # fmt: skip


@kind
def structures_that_refer_to_themselves(dice: Dice) -> bytes:
    return archive(
        beside(
            dice.choice([b"]q\x01h\x01a", b"}q\x01Nh\x01s", b"]q\x01h\x01\x85a", b"}q\x01" + text("a") + b"]h\x01as"])
        )
    )


@kind
def laughs(dice: Dice) -> bytes:
    pair = dice.choice([b"\x86", b"l"])
    step = b"q\x010(h\x01h\x01l" if pair == b"l" else b"q\x010h\x01h\x01\x86"
    return archive(beside(b"N\x85" + step * dice.choice([30, 64, 1000])))


@kind
def a_compressed_archive(dice: Dice) -> bytes:
    buffer = io.BytesIO()
    method = dice.choice([zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    with zipfile.ZipFile(buffer, "w", method) as file:
        file.writestr("archive/data.pkl", state())
        file.writestr("archive/data/0", bytes(dice.many(1 << 23)))
    return buffer.getvalue()


@kind
def a_published_zip_that_grows(dice: Dice) -> bytes:
    buffer = io.BytesIO()
    method = dice.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    with zipfile.ZipFile(buffer, "w", method) as file:
        inner = bytes(dice.many(1 << 27)) if dice.random() < 0.5 else GOOD
        file.writestr(dice.choice(["model.ckpt", "../../model.ckpt", "/model.ckpt", f"{ESCAPES}.ckpt"]), inner)
        file.writestr(
            "config.yaml",
            dice.choice([b"\xff\xfe", b"a" * dice.many(1 << 26), b"model: {target: os.system}", b"- [" * 3000]),
        )
    content = buffer.getvalue()
    return content if dice.random() < 0.7 else content.replace(b"PK\x01\x02", b"PK\x01\x03", 1)


# --- lies -------------------------------------------------------------------------------------------------------------


@kind
def shapes_and_storages_beyond_the_file(dice: Dice) -> bytes:
    size = dice.choice([(1 << 40,), (3, 1 << 62), (7, 2), (1 << 31, 1 << 31, 1 << 31), (-1, 2), (3,), (1,) * 65])
    stride = dice.choice([(2, 1), (1,) * len(size), (1 << 62,) * len(size), (-1,) * len(size)])
    part = storage(
        count=dice.choice([6, 7, 1 << 40, -1, 0]), type_name=dice.choice(["FloatStorage", "ComplexDoubleStorage"])
    )
    offset = dice.choice([0, 1, -1, 1 << 62])
    if (size, stride, offset, part) == ((3,), (1,), 0, storage()):
        offset = 4
    return archive(state(text("a") + tensor(size, stride, offset, part)))


@kind
def references_of_wrong_type(dice: Dice) -> bytes:
    wrong = [
        b"N",
        b"]",
        b")",
        text("storage"),
        b"(NNNNNt",
        number(5),
        b"(" + text("storage") + text("FloatStorage") + b"NNNt",
    ]
    for key in (b"]", b"(K\x01t", b"N", text("../../../etc/passwd"), text("a" * 100_000), text(ESCAPES)):
        wrong.append(b"(" + text("storage") + named("torch", "FloatStorage") + key + text("cpu") + number(6) + b"t")
    for count in (b"G" + struct.pack(">d", 6.0), b"\x88", text("6"), b"N", number(1 << 2000)):
        wrong.append(b"(" + text("storage") + named("torch", "FloatStorage") + text("0") + text("cpu") + count + b"t")
    part = dice.choice(wrong) + b"Q"
    return archive(state(text("a") + tensor(part=part)))


@kind
def arguments_of_wrong_type(dice: Dice) -> bytes:
    function = dice.choice([("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter"),
                            ("torch", "Size"),
                            ("collections", "OrderedDict"), ("torch._tensor", "_rebuild_from_type_v2"),
                            ("torch", "float32"), ("torch._utils", "_rebuild_qtensor"),
                            ("torch._utils", "_rebuild_sparse_tensor")])  # fmt: skip
    arguments = [
        dice.choice([b"N", b"]", b"}", number(3), text("a"), storage(), tensor()]) for _ in range(dice.randrange(7))
    ]
    return archive(state(text("a") + call(*function, *arguments)))


@kind
def an_unbalanced_program(dice: Dice) -> bytes:
    operations = [bytes([code]) for code in range(256)]
    return archive(beside(b"".join(dice.choices(operations, k=dice.randrange(1, 40)))))


@kind
def two_parts_with_one_name(dice: Dice) -> bytes:
    name, other = dice.choice([("DATA.PKL", state()), ("Data.pkl", b"\x80\x02N."), ("data/0 ", b""),
                               ("DATA/0", b"a" * 24), ("data.p\u212al", state())])  # fmt: skip
    evil = beside(call("os", "system", text(_TOUCH)))
    if name.strip() == "data/0":
        buffer = io.BytesIO(archive(state()))
        with zipfile.ZipFile(buffer, "a") as file:
            file.writestr("archive/data/0", bytes(24))
        return buffer.getvalue()
    return archive(state(), before={name: evil if other.startswith(b"\x80") else other})


@kind
def headers_that_disagree(dice: Dice) -> bytes:
    content = bytearray(archive(state()))
    directory = content.index(b"PK\x01\x02")
    place, values = dice.choice([
        (directory + 8, b"\x01\x00"), (directory + 10, b"\x08\x00"), (directory + 16, b"\x00\x00\x00\x00"),
        (directory + 20, b"\xff\xff\xff\x7f"), (directory + 24, b"\xff\xff\xff\x7f"),
        (directory + 42, b"\x05\x00\x00\x00"),
        (directory + 42, b"\xff\xff\xff\x7f"), (directory + 28, b"\xff\xff"), (directory + 6, b"\xff\xff"),
        (26, b"\x05\x00"), (28, b"\xff\xff"), (30, b"ARCHIVE"), (len(content) - 14, b"\x00\x00"),
        (len(content) - 10, b"\xff\xff\xff\x00"), (len(content) - 6, b"\x00\x00\x00\x00"),
        (len(content) - 6, b"\xff\xff\xff\xff"),
    ])  # fmt: skip
    content[place : place + len(values)] = values
    return bytes(content)


@kind
def something_before_or_after_the_archive(dice: Dice) -> bytes:
    evil, good = archive(beside(call("os", "system", text(_TOUCH)))), archive(state(), {"data/0": bytes(8)})
    return dice.choice([b"MZ" + evil, evil + good, good + evil, GOOD[:1000] + good, good + bytes(70_000)])


@kind
def a_directory_of_many_parts(dice: Dice) -> bytes:
    entry = struct.pack("<4s4B4HL2L5H2L", b"PK\x01\x02", 20, 0, 20, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0) + b"a"
    local = struct.pack("<4s2B4HL2L2H", b"PK\x03\x04", 20, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0) + b"a"
    entries = entry * dice.many(60_000, 400_000)
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 60_000, 60_000, len(entries), len(local), 0)
    return local + entries + end


@kind
def a_state_dict_of_other_things(dice: Dice) -> bytes:
    values = [
        None,
        [1, 2],
        "text",
        3,
        {},
        {"a": "b"},
        {1: torch.ones(1)},
        {ESCAPES: 1},
        {"n" * 2_000_000: 1},
        {"a": {"b": {}}},
    ]
    return saved(dice.choice([{"state_dict": dice.choice(values)}, dice.choice(values)]), dice.random() < 0.5)


@kind
def names_that_do_not_belong_in_a_message(dice: Dice) -> bytes:
    name = dice.choice([ESCAPES, "n" * 2_000_000, "a\n" * 1000, "\ud800", "", "." * 1000, "\u202e" * 50])
    entries = {
        f"{name}{i}" if name else f"{i}": torch.zeros(1) for i in range(dice.choice([1, 400]) if len(name) < 9 else 2)
    }
    return dice.choice([lambda: archive(state(*(text(key) + tensor() for key in entries))),
                       lambda: archive(beside(named("os", "system" + ESCAPES.replace("\n", ""))))])()  # fmt: skip


@kind
def frozen_parts_that_make_no_sense(dice: Dice) -> bytes:
    entry = dice.choice([1, {}, {"sha256": 3, "names": {}}, {"sha256": "a" * 64, "names": {"a": []}}, {"names": [1]},
                         {"sha256": "../" * 20, "names": {"a": "b"}},
                         {"sha256": "0" * 64, "names": {"a": "b"}}])  # fmt: skip
    return saved({"state_dict": WEIGHTS, "frozen": entry})


# --- damage -----------------------------------------------------------------------------------------------------------


@kind
def a_flipped_bit(dice: Dice) -> bytes:
    content = bytearray(GOOD)
    values = content.index(WEIGHTS["model.weight"].numpy().tobytes())
    content[dice.choice([values + 5, dice.randrange(60, 300)])] ^= 1 << dice.randrange(8)
    return bytes(content)


@kind
def the_end_is_missing(dice: Dice) -> bytes:
    content = dice.choice([GOOD, saved({"state_dict": WEIGHTS}, False), save(WEIGHTS)])
    return content[: dice.randrange(1, len(content) - 1)]


@kind
def a_part_is_zero_or_noise(dice: Dice) -> bytes:
    content = bytearray(dice.choice([GOOD, archive(state())]))
    start, length = dice.randrange(len(content) - 100), dice.randrange(16, 400)
    content[start : start + length] = bytes(length) if dice.random() < 0.5 else dice.randbytes(length)
    return bytes(content)


@kind
def the_old_format_damaged(dice: Dice) -> bytes:
    content = bytearray(saved({"state_dict": WEIGHTS}, False))
    for _ in range(dice.choice([1, 1, 5])):
        content[dice.randrange(15, len(content) - 60)] = dice.randrange(256)
    return bytes(content)


# --- other formats ----------------------------------------------------------------------------------------------------


@kind
def keys_in_the_old_format_that_are_none(dice: Dice) -> bytes:
    laughs = b"\x80\x02N\x85" + b"q\x010h\x01h\x01\x86" * dice.choice([25, 64, 1000]) + b"\x85."
    others = (b"}", b"N", b"](NN]}e", b"]" + number(1 << 2000) + b"a")
    keys = dice.choice([laughs, *(b"\x80\x02" + other + b"." for other in others)])
    parts = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, {})]
    return b"".join([*parts, keys])


@kind
def numbers_of_rare_types(dice: Dice) -> bytes:
    types = ["uint1", "uint7", "int3", "float8_e5m2", "float8_e8m0fnu", "float4_e2m1fn_x2", "complex64",
             "complex32", "bits8", "quint8", "uint64", "bool", "float64"]  # fmt: skip
    kind = named("torch", dice.choice(types))

    def rebuilt(*size: int) -> bytes:
        sides = b"(" + b"".join(map(number, size)) + b"t", b"(" + b"".join(map(number, (2, 1)[-len(size) :])) + b"t"
        part = storage(count=24, type_name="ByteStorage")
        return call("torch._utils", "_rebuild_tensor_v3", part, number(0), *sides, b"\x89", b"}", kind)

    entries = text("model.weight") + rebuilt(3, 2) + text("model.bias") + rebuilt(3)
    return archive(b"\x80\x02}" + text("state_dict") + b"}(" + entries + b"us.", {"data/0": bytes(48)})


@kind
def safetensors_that_lie(dice: Dice) -> bytes:
    def one(**changes: object) -> bytes:
        return json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **changes}}).encode()

    header = dice.choice([
        one(shape=[1 << 40]), one(data_offsets=[0, 1 << 40]), one(data_offsets=[4, 0]), one(data_offsets=[-1, 3]),
        one(dtype="X9"), one(dtype=3), one(shape=[1.5]), one(shape=[-1]), one(shape=[1 << 63]), one(shape="a"), b"{}",
        b"[]",
        b"{" * 100_000, b'{"a":' * 100_000, b'{"a":{}}', b'{"__metadata__": 3}', b"{\xff\xfe}", b'{"a": null}',
        json.dumps({f"t{i}": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for i in range(1000)}).encode(),
        json.dumps({"__metadata__": {"sha256": "0" * 64}, **json.loads(one())}).encode(),
        json.dumps({ESCAPES: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode(),
    ])  # fmt: skip
    length = dice.choice([len(header)] * 6 + [1 << 60, len(header) + 100, 0])
    return struct.pack("<Q", length) + header + bytes(4)


@kind
def a_safetensors_header_of_many_names(dice: Dice) -> bytes:
    entry = ",".join(
        f'"{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(dice.many(10_000, 500_000))
    )
    header = b"{" + entry.encode() + b"}"
    return struct.pack("<Q", len(header)) + header


@kind
def a_file_of_another_kind(dice: Dice) -> bytes:
    return dice.choice([
        b"", b"\0" * 5000, b"model: 1\n", pickle.dumps({"state_dict": {}}), b"version https://git-lfs.github.com/spec/v1\n",
        b"<!DOCTYPE html><html>", b"GGUF\x03", b"\x89HDF\r\n\x1a\n", b"\x93NUMPY\x01\x00", b"\x1f\x8b\x08",
        b"\x89PNG\r\n",
        b"PK\x05\x06" + bytes(18), b"PK\x03\x04", dice.randbytes(3000), b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.",
        b"{" * 20,
    ])  # fmt: skip


def _listen(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the name of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


SPECIAL |= {
    "a folder": Path.mkdir,
    "a FIFO": os.mkfifo,
    "a link to itself": lambda path: path.symlink_to(path),
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a socket": _listen,
}
