"""Pickles that call, change or import something, or ask for too much."""

from __future__ import annotations

from pathlib import Path


def pickles(folder: Path) -> dict[str, bytes]:
    """Pickles that call, change, import, or ask for too much."""
    touch = f"touch {folder / 'ran'}".encode()

    def text(value: bytes | str) -> bytes:
        data = value if isinstance(value, bytes) else value.encode()
        return b"X" + len(data).to_bytes(4, "little") + data

    def named(module: str, name: str) -> bytes:
        return f"c{module}\n{name}\n".encode()

    calls = {
        f"call {module}.{name}": b"\x80\x02" + named(module, name) + text(touch) + b"\x85R."
        for module, name in (
            ("os", "system"), ("posix", "system"), ("subprocess", "Popen"), ("builtins", "eval"),
            ("builtins", "exec"), ("builtins", "getattr"), ("builtins", "open"),
            ("builtins", "__import__"), ("importlib", "import_module"), ("runpy", "run_path"),
            ("torch.hub", "load"), ("torch", "load"), ("torch", "_C"), ("numpy", "load"),
            ("numpy.testing._private.utils", "runstring"), ("operator", "attrgetter"),
            ("functools", "partial"), ("collections", "namedtuple"), ("shutil", "rmtree"),
            ("retrodiff.cli", "main"), ("evil", "evil"), ("argparse", "FileType"),
            ("pathlib", "Path.unlink"), ("torch.serialization", "load"), ("webbrowser", "open"),
        )
    }  # fmt: skip
    state = b"N}" + text("most_common") + text("gone") + b"s\x86b."
    changes = {
        f"change {module}.{name}": b"\x80\x02" + named(module, name) + state
        for module, name in (
            ("collections", "Counter"), ("collections", "OrderedDict"), ("builtins", "dict"),
            ("_codecs", "encode"), ("torch", "FloatStorage"), ("torch", "float32"),
            ("torch._utils", "_rebuild_tensor_v2"), ("numpy", "dtype"), ("numpy", "ndarray"),
            ("numpy.core.multiarray", "_reconstruct"), ("torch", "Size"), ("os", "environ"),
        )
    }  # fmt: skip
    item = b"}" + text("a") + text("b") + b"s0"
    deep = b")" + b"\x85" * 200_000
    others = {
        "append to os.environ": b"\x80\x02" + named("os", "environ") + text("a") + b"a.",
        "set an item of Counter": b"\x80\x02" + named("collections", "Counter") + item[1:-1] + b".",
        "instance": b"(" + text("x") + f"i{'os'}\nsystem\n.".encode(),
        "object": b"(" + named("os", "system") + text(touch) + b"o.",
        "extension": b"\x80\x02\x82\x01.",
        "persistent": b"Pevil\n.",
        "buffer": b"\x80\x05\x97.",
        "new of a function": b"\x80\x02" + named("os", "system") + text(touch) + b"\x85\x81.",
        "memo bomb": b"\x80\x02Nr\xff\xff\xff\x7f.",
        "long": b"\x80\x02\x8b\xff\xff\xff\x7f.",
        "long bytes": b"\x80\x04\x8e" + (2**40).to_bytes(8, "little") + b"x.",
        "long text": b"\x80\x04\x8d" + (2**40).to_bytes(8, "little") + b"x.",
        "long array": b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b"x.",
        "long frame": b"\x80\x04\x95" + (2**40).to_bytes(8, "little") + b"N.",
        "many lists": b"\x80\x02" + named("builtins", "list") + b"q\x010](" + b"N" * 100_000
        + b"eq\x000" + b"h\x01h\x00\x85R" * 50_000 + b".",
        "many copies": b"\x80\x02" + named("_codecs", "encode") + b"q\x010" + text(b"a" * 1_000_000)
        + b"q\x000" + b"h\x01h\x00\x85R" * 20_000 + b".",
        "over and over": b"\x80\x02]q\x000" + b"".join(
            b"](h%ch%ceq%c0" % (i, i, i + 1) for i in range(60)
        ) + b"h\x3c.",
        "deep list": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
        "deep key": b"\x80\x02}" + deep + b"Ns.",
        "deep set": b"\x80\x04\x8f(" + deep + b"\x90.",
        "deep frozen set": b"\x80\x04(" + deep + b"\x91.",
        "deep call of set": b"\x80\x02" + named("builtins", "set") + b"](" + deep + b"e\x85R.",
        "wide integer key": b"\x80\x02}\x8b\x40\x42\x0f\x00" + b"\x01" * 10**6 + b"Ns.",
        "object array": b"\x80\x02" + named("numpy", "dtype") + text("O8") + b"\x85R.",
    }  # fmt: skip
    return {**calls, **changes, **others}
