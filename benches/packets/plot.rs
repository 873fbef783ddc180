//! Nanoseconds of a packet against the number of policies, both by powers of ten.

use std::fmt::Write;

use crate::report::Report;
use crate::variant::Kind;

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 460.0;
/// Room for the axes' numbers, left and below, and for the names of the lines on the right.
const LEFT: f64 = 70.0;
const BELOW: f64 = 50.0;
const RIGHT: f64 = 190.0;
const ABOVE: f64 = 20.0;
/// Powers of ten that the axes reach from and to.
const POLICIES: (i32, i32) = (0, 4);
const NANOSECONDS: (i32, i32) = (3, 6);

/// A line of the plot: its name, where that is besides its end, its colour, and what is on it.
type Line = (&'static str, f64, &'static str, fn(Kind) -> Option<u32>);

const LINES: [Line; 4] = [
    ("origin, steered", -4.0, "#c0392b", |kind| match kind {
        Kind::Seed { policies, selected: true } => Some(policies),
        _ => None,
    }),
    ("origin, unselected", 12.0, "#e59866", |kind| match kind {
        Kind::Seed { policies, selected: false } => Some(policies),
        _ => None,
    }),
    ("steered", 4.0, "#1f618d", |kind| match kind {
        Kind::Ours { policies, gateways: 1, selected: true, caching: false } => Some(policies),
        _ => None,
    }),
    ("unselected", 4.0, "#5dade2", |kind| match kind {
        Kind::Ours { policies, gateways: 1, selected: false, caching: false } => Some(policies),
        _ => None,
    }),
];

/// The report as a picture.
pub(crate) fn svg(report: &Report) -> Result<String, std::fmt::Error> {
    let mut svg = String::new();
    writeln!(
        svg,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" \
         font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>"
    )?;
    axes(&mut svg)?;
    if let Some(cost) = report.of(Kind::Plain) {
        let y = y(cost.warm);
        line(&mut svg, ("no rules", 4.0), "#7f8c8d", &[(x(1.0), y), (x(10_000.0), y)])?;
    }
    for (name, lower, colour, policies) in LINES {
        let on_it = report
            .all()
            .iter()
            .filter_map(|(kind, cost)| Some((x(policies(*kind)?.into()), y(cost.warm))));
        let points: Vec<_> = on_it.collect();
        line(&mut svg, (name, lower), colour, &points)?;
        for (x, y) in points {
            writeln!(svg, "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3.5\" fill=\"{colour}\"/>")?;
        }
    }
    svg.push_str("</svg>\n");
    Ok(svg)
}

fn scale(value: f64, (from, to): (i32, i32), length: f64) -> f64 {
    (value.log10() - f64::from(from)) / f64::from(to - from) * length
}

fn x(policies: f64) -> f64 {
    LEFT + scale(policies, POLICIES, WIDTH - LEFT - RIGHT)
}

fn y(nanoseconds: f64) -> f64 {
    HEIGHT - BELOW - scale(nanoseconds, NANOSECONDS, HEIGHT - BELOW - ABOVE)
}

fn axes(svg: &mut String) -> std::fmt::Result {
    let (left, right) = (LEFT, WIDTH - RIGHT);
    let (top, bottom) = (ABOVE, HEIGHT - BELOW);
    for power in POLICIES.0..=POLICIES.1 {
        let (value, x) = (10_u32.pow(power.unsigned_abs()), x(10_f64.powi(power)));
        let label = bottom + 18.0;
        writeln!(
            svg,
            "<path d=\"M{x:.1} {top}V{bottom}\" stroke=\"#ddd\"/>\n\
             <text x=\"{x:.1}\" y=\"{label}\" text-anchor=\"middle\">{value}</text>"
        )?;
    }
    for power in NANOSECONDS.0..=NANOSECONDS.1 {
        let (value, y) = (10_u32.pow(power.unsigned_abs() - 3), y(10_f64.powi(power)));
        let (edge, middle) = (left - 8.0, y + 4.0);
        writeln!(
            svg,
            "<path d=\"M{left} {y:.1}H{right}\" stroke=\"#ddd\"/>\n\
             <text x=\"{edge}\" y=\"{middle:.1}\" text-anchor=\"end\">{value} µs</text>"
        )?;
    }
    let (middle, below) = (f64::midpoint(left, right), HEIGHT - 10.0);
    writeln!(svg, "<text x=\"{middle}\" y=\"{below}\" text-anchor=\"middle\">policies</text>")
}

/// A line through the points, with its name at its end.
fn line(
    svg: &mut String,
    (name, lower): (&str, f64),
    colour: &str,
    points: &[(f64, f64)],
) -> std::fmt::Result {
    let Some((x, y)) = points.last() else { return Ok(()) };
    let (beside, middle) = (x + 10.0, y + lower);
    svg.push_str("<polyline fill=\"none\" stroke-width=\"2\" points=\"");
    for (x, y) in points {
        write!(svg, "{x:.1},{y:.1} ")?;
    }
    writeln!(
        svg,
        "\" stroke=\"{colour}\"/>\n<text x=\"{beside:.1}\" y=\"{middle:.1}\">{name}</text>"
    )
}
