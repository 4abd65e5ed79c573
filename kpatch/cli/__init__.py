"""The command line: one thin function per command, one output, one error boundary."""
