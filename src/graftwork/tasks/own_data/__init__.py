"""Users' own data: rows of any common file format, recognised or mapped to inputs and targets."""
