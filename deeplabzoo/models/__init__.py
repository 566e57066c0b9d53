"""The network: encoder, atrous head, resize. Nothing here knows where weights come from."""
