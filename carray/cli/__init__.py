"""cli: the subcommands of `carray`, one thin function each, one module a group; `__main__` lists them."""
