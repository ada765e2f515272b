//! A sweep over rates as a picture.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::prelude::*;

/// What was measured at one rate.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Point {
    pub(crate) rate: u32,
    pub(crate) p50_ms: f64,
    pub(crate) p99_ms: f64,
    /// Of the dispatcher, where it can be told.
    pub(crate) core_percent: Option<f64>,
}

/// The points of each place, in the order of their rates.
pub(crate) type Places<'a> = [(&'a str, Vec<Point>)];

const SIZE: (u32, u32) = (880, 680);
const UPPER: i32 = 420;
const COLOURS: [RGBColor; 2] = [RGBColor(31, 119, 180), RGBColor(214, 39, 40)];

/// Latency by rate above, both on logarithmic axes, and what the dispatcher used of a core below.
pub(crate) fn write(path: &Path, places: &Places<'_>) -> Result<()> {
    draw(path, places).map_err(|error| anyhow!("cannot draw {}: {error}", path.display()))
}

/// Without a nought behind the point.
fn plain(value: &f64) -> String {
    value.to_string()
}

fn draw(path: &Path, places: &Places<'_>) -> Result<(), Box<dyn std::error::Error>> {
    let all = || places.iter().flat_map(|(_, points)| points);
    let rates = || all().map(|point| f64::from(point.rate));
    let (least, most) = (rates().fold(f64::MAX, f64::min), rates().fold(1.0, f64::max));
    let across = (least..most.max(least + 1.0)).log_scale();
    let high = all().map(|point| point.p99_ms).fold(1.0, f64::max) * 1.5;
    let low = all().map(|point| point.p50_ms).fold(high, f64::min).max(0.01) / 1.5;

    let root = SVGBackend::new(path, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let (upper, lower) = root.split_vertically(UPPER);
    let mut latency = ChartBuilder::on(&upper)
        .caption("From commit to handler", ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(60)
        .build_cartesian_2d(across.clone(), (low..high).log_scale())?;
    latency
        .configure_mesh()
        .x_desc("messages a second")
        .x_label_formatter(&plain)
        .y_label_formatter(&plain)
        .y_desc("milliseconds")
        .light_line_style(TRANSPARENT)
        .draw()?;
    for ((place, points), colour) in places.iter().zip(COLOURS) {
        for (what, thickness, of) in [
            ("p50", 2, (|point: &Point| point.p50_ms) as fn(&Point) -> f64),
            ("p99", 1, |point| point.p99_ms),
        ] {
            let style = colour.stroke_width(thickness);
            let line = points.iter().map(|point| (f64::from(point.rate), of(point)));
            latency
                .draw_series(LineSeries::new(line, style).point_size(2 + thickness))?
                .label(format!("{place}, {what}"))
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], style));
        }
    }
    latency
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.9))
        .border_style(BLACK.mix(0.3))
        .draw()?;

    let used = || all().filter_map(|point| Some((f64::from(point.rate), point.core_percent?)));
    let most = used().map(|(_, percent)| percent).fold(25.0, f64::max);
    let mut core = ChartBuilder::on(&lower)
        .caption(
            "What the dispatcher and its connections use of a core",
            ("sans-serif", 18),
        )
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(60)
        .build_cartesian_2d(across, 0.0..most * 1.1)?;
    core.configure_mesh()
        .x_desc("messages a second")
        .x_label_formatter(&plain)
        .y_label_formatter(&plain)
        .y_desc("percent")
        .light_line_style(TRANSPARENT)
        .draw()?;
    core.draw_series(LineSeries::new(used(), COLOURS[1].stroke_width(2)).point_size(4))?;
    root.present()?;
    Ok(())
}
