"""The command line: `openvla <command>`, what the commands share, and their help."""
