"""Cards, verification, the Hub, and the two layouts of a finished folder."""
