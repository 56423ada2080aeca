"""What every part of a process needs and no library brings: files that appear whole, and progress that shows."""
