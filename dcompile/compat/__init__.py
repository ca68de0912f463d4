"""Every private part of torch and diffusers that dcompile uses, one function each."""
