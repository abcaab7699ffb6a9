"""Plans and reports as pictures: `grid.py` (the numbers), `panels.py` (what is shown), `png.py` and `html.py` (drawn)."""
