"""The command line: `openvla <command>`, code shared by the commands, and their help."""
