"""Caption the images of a Parquet table or of a folder, on the cluster it is submitted to.

ray job submit --working-dir . -- python ray_jobs/caption.py /data/images --output /data/captions
python ray_jobs/caption.py photos/ --output captions/ --model tiny
"""

import argparse

from flashvl.entrypoint import report_errors, show_progress, start_ray


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # the defaults are CaptionJob's
    )
    parser.add_argument("input", help="Parquet file, folder or glob; or a folder of images")
    parser.add_argument("--output", required=True, metavar="DIR", help="new or empty folder")
    parser.add_argument("--model", help="shipped model's name or a Flash-VL folder")
    parser.add_argument("--prompt", help="asked about every image")
    parser.add_argument("--max-new-tokens", type=int)
    parser.add_argument("--batch-size", type=int, help="images that an engine captions together")
    parser.add_argument("--num-engines", type=int, help="engines in the pool, each with its GPU")
    arguments = parser.parse_args()
    with report_errors():
        from flashvl.batch.job import CaptionJob, run_caption_job
        from flashvl.config import validate

        job = validate(CaptionJob, vars(arguments), source="caption")
        start_ray()
        with show_progress("captioning") as on_progress:
            summary = run_caption_job(job, on_progress)
        print(
            f"{job.output}: {summary.input} images, {summary.written} captions,"
            f" {summary.dead} dead letters, {summary.seconds:.1f} s,"
            f" {summary.images_per_s:.1f} images/s"
        )


if __name__ == "__main__":
    main()
