"""Model folders on disk: read block by block, written whole or resumably, dense or packed."""
