"""What the commands do with a composed config: check it, build from it, run it."""
