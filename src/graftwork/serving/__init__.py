"""HTTP server that answers with a regrad model: request queue, endpoints, and web page."""
