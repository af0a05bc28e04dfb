"""`python -m eclipse_ray VERB ...` is `eclipse-ray VERB ...`."""

from eclipse_ray.cli import main

if __name__ == "__main__":
    main()
