//! Problems as JSON.

use serde::Serialize;
use serde::ser::{SerializeStruct, Serializer};

use super::problem::Problem;

impl Serialize for Problem {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut fields = serializer.serialize_struct("Problem", 5)?;
        fields.serialize_field("code", self.code())?;
        fields.serialize_field("severity", &self.severity().to_string())?;
        fields.serialize_field("family", &self.family())?;
        fields.serialize_field("message", &self.to_string())?;
        fields.serialize_field("remedy", &self.remedy())?;
        fields.end()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{json, to_value};

    use super::*;
    use crate::types::Family;

    #[test]
    fn problem_has_code_severity_and_remedy() {
        let problem = Problem::ConntrackFull { count: 9, max: 10 };
        let json = to_value(&problem).unwrap();
        assert_eq!((&json["code"], &json["severity"]), (&json!("conntrack_full"), &json!("risk")));
        assert_eq!(json["family"], json!(null));
        let of_one = to_value(Problem::MarkReflected { family: Family::V6 }).unwrap();
        assert_eq!(of_one["family"], "V6");
        assert_eq!(json["message"], problem.to_string());
        assert_eq!(json["remedy"], problem.remedy());
    }
}
