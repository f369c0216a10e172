"""The `xmag` command: one thin module a verb. It wires the other rooms and computes nothing."""
