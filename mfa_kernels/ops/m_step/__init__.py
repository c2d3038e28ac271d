"""EM's M-step: means and loadings in closed form, from the sufficient statistics and a prior."""
