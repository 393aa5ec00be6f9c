"""The TOML file and the command line."""

from . import Bad

ROWS = [
    Bad("utf-16", ["run.toml", "UTF-16", "save it as UTF-8"], lambda i: i.write("run.toml", "a = 1".encode("utf-16"))),
    Bad("latin-1", ["run.toml", "not UTF-8", "line 2"], lambda i: i.write("run.toml", b"# 1\n# \xe9\n")),
    Bad("a zero byte", ["run.toml", "not valid TOML"], lambda i: i.write("run.toml", b"a = 1\x00")),
    Bad("nested too deeply", ["run.toml", "nested too deeply"], lambda i: i.write("run.toml", "a = " + "[" * 9000)),
    Bad("half a line", ["run.toml", "not valid TOML"], lambda i: i.write("run.toml", "[model]\npath = ")),
]
