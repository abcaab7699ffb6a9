"""The model block by block with its real inputs."""
