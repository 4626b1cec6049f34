"""The configuration of a training: sections.py has every key, reading.py says where its values come from."""
