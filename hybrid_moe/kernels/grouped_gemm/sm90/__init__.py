"""Warp-specialised grouped GEMMs for compute capability 9.0, in Gluon."""
