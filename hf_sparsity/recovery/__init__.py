"""Train what is left while the zeros stay zero."""
