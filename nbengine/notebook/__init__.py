"""The notebook interface: magics, and what they show. Thin over Engine; nothing in here holds a tensor."""
