"""Writers of the encoder and cost tables that the package ships."""
