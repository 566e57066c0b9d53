"""Writers of the generated pages of docs/."""
