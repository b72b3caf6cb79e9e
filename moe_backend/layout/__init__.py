"""Who owns what: token routing and expert ownership."""
