"""How one model becomes many: index arithmetic, tensor-parallel modules, pipeline stages."""
